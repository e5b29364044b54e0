package session

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"unicode/utf8"

	"gatehouse/session/rawjson"
)

// maxID bounds what is kept and echoed of a foreign request id.
const maxID = 256

// message is one JSON-RPC message of a remote. The raw values are slices of
// the data that it was parsed from.
type message struct {
	id     json.RawMessage
	method string          // of a request or notification
	params json.RawMessage // nil: none
	result json.RawMessage // of a response
	err    *ResponseError
}

func (m *message) isResponse() bool     { return m.method == "" }
func (m *message) isNotification() bool { return m.method != "" && m.id == nil }

// parseMessage reads the envelope of a message. The errors say in our words
// what is wrong with it; they hold nothing of the data.
func parseMessage(data []byte) (*message, error) {
	// "JSON-RPC messages MUST be UTF-8 encoded."
	if !utf8.Valid(data) {
		return nil, errors.New("text that is not UTF-8")
	}
	if !json.Valid(data) {
		return nil, errors.New("invalid JSON")
	}
	if first := firstByte(data); first == '[' {
		// One request was sent, alone: there is one answer. Since 2025-06-18 there
		// are no batches at all.
		return nil, errors.New("a JSON-RPC batch")
	} else if first != '{' {
		return nil, errors.New("JSON that is not a message")
	}
	values, err := rawjson.Get(data, "jsonrpc", "id", "method", "params", "result", "error")
	if err != nil {
		return nil, errors.New("a message with a member twice")
	}
	version, id, method, result, failure := values[0], values[1], values[2], values[4], values[5]
	if s, _ := rawjson.String(version); s != "2.0" {
		return nil, errors.New("a message without \"jsonrpc\":\"2.0\"")
	}
	m := &message{id: id, params: values[3]}
	if method != nil {
		name, ok := rawjson.String(method)
		if !ok || name == "" || result != nil || failure != nil {
			return nil, errors.New("a message that is neither request nor response")
		}
		// "The ID MUST be a string or integer … MUST NOT be null."
		if id != nil && (len(id) > maxID || id[0] != '"' && !isNumber(id[0])) {
			return nil, errors.New("a request with an unusable id")
		}
		m.method = name
		return m, nil
	}
	switch {
	case (result == nil) == (failure == nil) || id == nil && result != nil:
		return nil, errors.New("a message that is neither request nor response")
	case failure != nil:
		if m.err, err = parseError(failure); err != nil {
			return nil, err
		}
	case result[0] != '{':
		return nil, errors.New("a result that is not an object")
	default:
		m.result = result
	}
	return m, nil
}

// parseError reads the error of a response.
func parseError(data []byte) (*ResponseError, error) {
	if data[0] != '{' {
		return nil, errors.New("an error that is not an object")
	}
	values, err := rawjson.Get(data, "code", "message", "data")
	if err != nil {
		return nil, errors.New("an error with a member twice")
	}
	code, err := strconv.ParseInt(string(values[0]), 10, 64)
	if err != nil {
		return nil, errors.New("an error without an integer code")
	}
	text, _ := rawjson.String(values[1])
	return &ResponseError{Code: code, Message: text, Data: values[2]}, nil
}

// answers reports whether a response's id is that of our request.
func (m *message) answers(id int64) bool {
	n, err := strconv.ParseInt(string(m.id), 10, 64)
	return err == nil && n == id
}

func isNumber(c byte) bool { return c == '-' || '0' <= c && c <= '9' }

func firstByte(data []byte) byte {
	for _, c := range data {
		if c != ' ' && c != '\t' && c != '\n' && c != '\r' {
			return c
		}
	}
	return 0
}

// appendRequest appends a request, or a notification if id is 0. Params are
// taken as they are; nil means none.
func appendRequest(b []byte, id int64, method string, params json.RawMessage) ([]byte, error) {
	b = append(b, `{"jsonrpc":"2.0",`...)
	if id != 0 {
		b = append(b, `"id":`...)
		b = strconv.AppendInt(b, id, 10)
		b = append(b, ',')
	}
	b = append(b, `"method":`...)
	b, err := appendString(b, method)
	if err != nil {
		return nil, err
	}
	if params != nil {
		b = append(b, `,"params":`...)
		b = append(b, params...)
	}
	return append(b, '}'), nil
}

// appendString appends a JSON string. Method names need no encoding.
func appendString(b []byte, s string) ([]byte, error) {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\\' {
			quoted, err := json.Marshal(s)
			if err != nil {
				return nil, fmt.Errorf("encoding a string: %w", err)
			}
			return append(b, quoted...), nil
		}
	}
	b = append(b, '"')
	b = append(b, s...)
	return append(b, '"'), nil
}
