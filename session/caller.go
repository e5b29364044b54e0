package session

import (
	"bytes"
	"context"
	"encoding/json"

	"gatehouse/session/rawjson"
)

// Caller is the client behind a call, as far as a remote notices it. The zero
// Caller has no client: it hears nothing and can be asked nothing.
type Caller struct {
	// Client tells this client from the principal's others; nil in the stateless
	// era, where a request is all that there is. It must be comparable.
	Client any
	// Gone is closed before [Session.Leave] is called for the client; nil: never.
	Gone <-chan struct{}
	// Modern says that the client speaks protocol 2026-07-28 or newer.
	Modern bool
	// Capabilities is the object of what the client declares (MCP
	// ClientCapabilities), as it sent it; nil: nothing.
	Capabilities json.RawMessage
	// Notify takes what belongs to the call while it lasts. It may be nil.
	Notify func(method string, params json.RawMessage)
	// Later takes what a remote has to say to the client after its calls. It may
	// be nil.
	Later func(method string, params json.RawMessage)
	// Ask sends the client a request and returns its result; a
	// [*ResponseError] is the client's own. It may be nil.
	Ask func(ctx context.Context, method string, params json.RawMessage) (json.RawMessage, error)
}

// What a remote may ask of a client, and the capability that it takes.
const (
	methodSample = "sampling/createMessage"
	methodElicit = "elicitation/create"
	methodRoots  = "roots/list"
)

var askable = map[string]string{methodSample: "sampling", methodElicit: "elicitation", methodRoots: "roots"}

// maxProfile bounds what a client can declare.
const maxProfile = 8 << 10

// tasksExtension has methods of its own that the gateway does not pass on.
const tasksExtension = "io.modelcontextprotocol/tasks"

// Profile returns the part of a client's capabilities that can be passed on:
// what remotes may ask, and extensions. It is an object; "{}" for none.
func Profile(capabilities json.RawMessage) json.RawMessage {
	if len(capabilities) == 0 || len(capabilities) > maxProfile {
		return noProfile
	}
	got, err := rawjson.Get(capabilities, "sampling", "elicitation", "roots", "extensions")
	if err != nil {
		return noProfile
	}
	profile := []byte{'{'}
	for i, name := range []string{"sampling", "elicitation", "roots", "extensions"} {
		value := got[i]
		if value == nil || value[0] != '{' {
			continue
		}
		if name == "extensions" {
			if value, err = rawjson.Delete(value, func(key string) bool { return key == tasksExtension }); err != nil || string(value) == "{}" {
				continue
			}
		}
		if len(profile) > 1 {
			profile = append(profile, ',')
		}
		profile = append(append(append(profile, '"'), name...), `":`...)
		profile = append(profile, value...)
	}
	return append(profile, '}')
}

var noProfile = json.RawMessage("{}")

// none reports whether a profile declares nothing.
func none(profile json.RawMessage) bool { return len(profile) <= len("{}") }

// Declares reports whether a client with these capabilities can be asked this.
func Declares(capabilities json.RawMessage, method string, params json.RawMessage) bool {
	capability := askable[method]
	if capability == "" {
		return false
	}
	got, err := rawjson.Get(capabilities, capability)
	if err != nil || got[0] == nil || got[0][0] != '{' {
		return false
	}
	if method != methodElicit {
		return true
	}
	mode := "form"
	if given, err := rawjson.Get(params, "mode"); err != nil {
		return false
	} else if given[0] != nil {
		mode, _ = rawjson.String(given[0])
	}
	modes, err := rawjson.Get(got[0], "form", "url")
	if err != nil {
		return false
	}
	switch mode {
	case "form":
		// "For backwards compatibility, an empty capabilities object is equivalent
		// to declaring support for form mode only".
		return modes[0] != nil || modes[1] == nil
	case "url":
		return modes[1] != nil
	}
	return false
}

// withoutEnvelope removes from a request's _meta what protocol 2026-07-28 says
// there about client and connection. It is between the client and the gateway;
// the remote has its own with the gateway.
func withoutEnvelope(params json.RawMessage) (json.RawMessage, error) {
	// Hardly any legacy call has one. A key may be written with escapes.
	if !bytes.Contains(params, []byte("_meta")) && !bytes.ContainsRune(params, '\\') {
		return params, nil
	}
	got, err := rawjson.Get(params, "_meta")
	if err != nil || got[0] == nil || got[0][0] != '{' {
		return params, err
	}
	found := false
	meta, err := rawjson.Delete(got[0], func(key string) bool {
		switch key {
		case metaVersion, metaClient, metaCapabilities, metaLogLevel:
			found = true
			return true
		}
		return false
	})
	if err != nil || !found {
		return params, err
	}
	return rawjson.Set(params, "_meta", meta)
}
