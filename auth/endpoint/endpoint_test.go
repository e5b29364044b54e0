package endpoint

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"gatehouse/auth/secret"
)

func TestParseAnswer(t *testing.T) {
	const js = "application/json; charset=utf-8"
	const canary = "canary-41c9"
	for _, tt := range []struct {
		name        string
		status      int
		contentType string
		body        string
		wantErr     string // empty: accepted
		wantCode    string
		refused     bool
		lives       time.Duration
	}{
		{name: "plain", body: `{"access_token":"a","token_type":"Bearer"}`},
		{name: "lower case type", body: `{"access_token":"a","token_type":"bearer","expires_in":60}`, lives: time.Minute},
		{name: "lifetime as text", body: `{"access_token":"a","token_type":"bearer","expires_in":"60"}`, lives: time.Minute},
		{name: "lifetime null", body: `{"access_token":"a","token_type":"bearer","expires_in":null}`},
		{name: "lifetime zero", body: `{"access_token":"a","token_type":"bearer","expires_in":0}`},
		{name: "lifetime huge", body: `{"access_token":"a","token_type":"bearer","expires_in":1e300}`, lives: MaxLifetime},
		{name: "lifetime with a fraction", body: `{"access_token":"a","token_type":"bearer","expires_in":1.5}`, lives: 1500 * time.Millisecond},
		{name: "lifetime negative", body: `{"access_token":"a","token_type":"bearer","expires_in":-1}`, wantErr: "expires_in"},
		{name: "lifetime no number", body: `{"access_token":"a","token_type":"bearer","expires_in":"NaN"}`, wantErr: "expires_in"},
		{name: "lifetime an object", body: `{"access_token":"a","token_type":"bearer","expires_in":{}}`, wantErr: "expires_in"},
		{name: "HTML", contentType: "text/html", body: "<html>" + canary, wantErr: "not JSON"},
		{name: "JSON as HTML", contentType: "text/html", body: `{"access_token":"a","token_type":"Bearer"}`, wantErr: "not JSON"},
		{name: "no content type", contentType: "-", body: `{"access_token":"a","token_type":"Bearer"}`, wantErr: "not JSON"},
		{name: "HTML as JSON", body: "<html>" + canary, wantErr: "not the JSON"},
		{name: "trailing", body: `{"access_token":"a","token_type":"Bearer"}` + canary, wantErr: "not the JSON"},
		{name: "number as token", body: `{"access_token":5,"token_type":"Bearer"}`, wantErr: "not the JSON"},
		{name: "empty", body: ``, wantErr: "not the JSON"},
		{name: "null", body: `null`, wantErr: "no access_token"},
		{name: "empty token", body: `{"access_token":"","token_type":"Bearer"}`, wantErr: "no access_token"},
		{name: "mac", body: `{"access_token":"` + canary + `","token_type":"mac"}`, wantErr: "token_type"},
		{name: "no type", body: `{"access_token":"` + canary + `"}`, wantErr: "token_type"},
		{name: "CRLF", body: `{"access_token":"` + canary + `\r\nX: y","token_type":"Bearer"}`, wantErr: "characters"},
		{name: "NUL in refresh token", body: `{"access_token":"a","refresh_token":"` + canary + `\u0000","token_type":"Bearer"}`, wantErr: "characters"},
		{name: "not ASCII", body: `{"access_token":"ä","token_type":"Bearer"}`, wantErr: "characters"},
		{name: "307", status: 307, body: `{}`, wantErr: "redirected"},
		{name: "201", status: 201, body: `{"access_token":"a","token_type":"Bearer"}`, wantErr: "failed"},
		{name: "503", status: 503, body: canary, wantErr: "failed"},
		{name: "503 with a code", status: 503, body: `{"error":"invalid_grant"}`, wantErr: "failed"},
		{name: "429 with a code", status: 429, body: `{"error":"slow_down"}`, wantErr: "error", wantCode: "other"},
		{name: "invalid_grant", status: 400, body: `{"error":"invalid_grant","error_description":"` + canary + `"}`, wantErr: "error", wantCode: "invalid_grant", refused: true},
		{name: "error with 200", body: `{"error":"invalid_grant"}`, wantErr: "error", wantCode: "invalid_grant", refused: true},
		{name: "foreign code", status: 400, body: `{"error":"` + canary + `"}`, wantErr: "error", wantCode: "other", refused: true},
		{name: "busy", status: 400, body: `{"error":"temporarily_unavailable"}`, wantErr: "error", wantCode: "temporarily_unavailable"},
		{name: "error as HTML", status: 400, contentType: "text/html", body: `{"error":"invalid_grant"}`, wantErr: "failed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			status, contentType := tt.status, tt.contentType
			if status == 0 {
				status = http.StatusOK
			}
			switch contentType {
			case "":
				contentType = js
			case "-":
				contentType = ""
			}
			a, err := ParseAnswer(status, contentType, []byte(tt.body))
			if tt.wantErr == "" {
				if err != nil {
					t.Fatal(err)
				}
				if a.ExpiresIn != tt.lives {
					t.Errorf("lives %v, want %v", a.ExpiresIn, tt.lives)
				}
				return
			}
			if err == nil {
				t.Fatal("accepted")
			}
			e, ok := errors.AsType[*Error](err)
			if !ok || !strings.Contains(err.Error(), tt.wantErr) || e.Code != tt.wantCode || e.Refused() != tt.refused {
				t.Errorf("got %q, code %q, refused %v", err, e.Code, e.Refused())
			}
			if strings.Contains(err.Error(), canary) {
				t.Errorf("the error holds foreign text: %v", err)
			}
		})
	}
}

func FuzzParseAnswer(f *testing.F) {
	f.Add(200, "application/json", []byte(`{"access_token":"a","token_type":"Bearer","expires_in":"1","scope":["x"]}`))
	f.Add(400, "application/json", []byte(`{"error":"invalid_grant"}`))
	f.Fuzz(func(t *testing.T, status int, contentType string, body []byte) {
		a, err := ParseAnswer(status, contentType, body)
		if err != nil {
			return
		}
		if status != 200 || a.Access.IsEmpty() || a.ExpiresIn < 0 || a.ExpiresIn > MaxLifetime {
			t.Errorf("accepted: %d, %v", status, a.ExpiresIn)
		}
		for _, s := range []secret.Text{a.Access, a.Refresh, a.ID} {
			if !VisibleASCII(s.Value()) {
				t.Error("a token that fits no header was accepted")
			}
		}
	})
}

// Whose time was over is told apart: the caller's, or that which a request has.
func TestWhoseTimeIsOver(t *testing.T) {
	stop := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/body" {
			w.WriteHeader(http.StatusOK)
			w.(http.Flusher).Flush()
		}
		<-stop
	}))
	defer server.Close()
	defer close(stop)
	for _, path := range []string{"/", "/body"} {
		for _, left := range []bool{true, false} {
			hc := &http.Client{Timeout: 50 * time.Millisecond}
			defer hc.CloseIdleConnections()
			ctx := t.Context()
			if left {
				hc.Timeout = 0
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, 50*time.Millisecond)
				defer cancel()
			}
			_, err := Token(ctx, hc, server.URL+path, Client{ID: "c"}, url.Values{})
			if e, ok := errors.AsType[*Error](err); !ok || e.Left != left || !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s, the caller's time %v: %+v", path, left, err)
			}
		}
	}
}

func TestPostAuthenticates(t *testing.T) {
	var got *http.Request
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		r.ParseForm()
		got = r
	}))
	defer server.Close()
	defer server.Client().CloseIdleConnections()
	post := func(c Client) error {
		resp, err := Post(t.Context(), server.Client(), server.URL, c, url.Values{"k": {"v"}})
		if err == nil {
			resp.Body.Close()
		}
		return err
	}
	const id, pass = "a:b c", "p%+ä/&"
	if err := post(Client{ID: id, Secret: secret.New(pass)}); err != nil {
		t.Fatal(err)
	}
	// RFC 6749 section 2.3.1 and its appendix B.
	user, password, _ := got.BasicAuth()
	if user != "a%3Ab+c" || password != "p%25%2B%C3%A4%2F%26" || got.PostForm.Has("client_id") || got.PostForm.Has("client_secret") {
		t.Errorf("Basic: %q and %q, form %v", user, password, got.PostForm)
	}
	if err := post(Client{ID: id, Secret: secret.New(pass), Method: "client_secret_post"}); err != nil {
		t.Fatal(err)
	}
	if got.Header.Get("Authorization") != "" || got.PostForm.Get("client_id") != id || got.PostForm.Get("client_secret") != pass {
		t.Errorf("post: %v", got.PostForm)
	}
	if err := post(Client{ID: id}); err != nil {
		t.Fatal(err)
	}
	if got.Header.Get("Authorization") != "" || got.PostForm.Get("client_id") != id || got.PostForm.Has("client_secret") {
		t.Errorf("none: %v", got.PostForm)
	}
	got = nil
	if err := post(Client{ID: id, Method: "private_key_jwt"}); err == nil || got != nil {
		t.Errorf("an unsupported method: %v, sent: %v", err, got != nil)
	}
}

// TestUnanswered: who failed half-way may have used a refresh token up; who has
// decided, or could not begin, has not.
func TestUnanswered(t *testing.T) {
	for status, want := range map[int]bool{
		200: true, 400: false, 401: false, 404: false, 429: false, 500: true, 501: true, 502: true, 503: false, 504: true,
	} {
		if got := (&Error{Status: status}).Unanswered(); got != want {
			t.Errorf("%d: %v, want %v", status, got, want)
		}
	}
	if (&Error{Status: 200, Code: "invalid_grant"}).Unanswered() {
		t.Error("an error with status 200 is an answer")
	}
}
