package session

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strconv"

	"gatehouse/session/rawjson"
)

const (
	notifyProgress  = "notifications/progress"
	notifyCancelled = "notifications/cancelled"
	notifyMessage   = "notifications/message"
)

// remint replaces the progress token in a request's params by the request's own
// id, so that two clients with the same token never meet at a remote. It
// returns the client's token, nil for none.
func remint(params json.RawMessage, id int64) (out, token json.RawMessage, err error) {
	// Hardly any call asks for progress, and most are not worth a second look. A
	// client that writes the key with escapes goes without.
	if !bytes.Contains(params, []byte(`"progressToken"`)) {
		return params, nil, nil
	}
	got, err := rawjson.Get(params, "_meta")
	if err != nil {
		return nil, nil, fmt.Errorf("reading params: %w", err)
	}
	meta := got[0]
	if meta == nil || meta[0] != '{' {
		return params, nil, nil
	}
	if got, err = rawjson.Get(meta, "progressToken"); err != nil {
		return nil, nil, fmt.Errorf("reading _meta: %w", err)
	}
	if token = got[0]; token == nil {
		return params, nil, nil
	}
	if meta, err = rawjson.Set(meta, "progressToken", strconv.AppendInt(nil, id, 10)); err != nil {
		return nil, nil, fmt.Errorf("replacing the progress token: %w", err)
	}
	if out, err = rawjson.Set(params, "_meta", meta); err != nil {
		return nil, nil, fmt.Errorf("replacing _meta: %w", err)
	}
	return out, token, nil
}
