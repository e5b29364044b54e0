package gateway

import (
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/tailscale/hujson"

	"gatehouse/auth/secret"
)

// Config is a checked configuration with its defaults filled in.
type Config struct {
	Servers []Server // in the file's order, those that do not run included
	Gateway Settings
	dir     string // of the file: paths in it are relative to there
}

// Server is one entry of mcpServers: a remote.
type Server struct {
	Name           string
	URL            *url.URL // nil unless Type is http or sse
	Type           string   // http | sse | stdio
	Headers        map[string]secret.Text
	Timeout        time.Duration // of one call
	Disabled       bool
	Prefix         *string // nil: the name
	Tools          Tools
	AllowAddresses []netip.Prefix
	TLS            TLS
	Auth           Auth
	Command        string // of a local program; empty unless Type is stdio
	Args           []string
	Env            map[string]secret.Text // beside what every program gets
	Dir            string                 // where it runs; empty: where the gateway does
}

// Tools are globs over the remote's own tool names.
type Tools struct {
	Allow []string `json:"allow"` // empty: all
	Deny  []string `json:"deny"`  // wins over Allow
}

// TLS is towards a remote; the fields but ServerName are files.
type TLS struct {
	CA         string `json:"ca"` // adds to the system's roots
	Cert       string `json:"cert"`
	Key        string `json:"key"`
	ServerName string `json:"serverName"`
}

// Settings are the gateway's own.
type Settings struct {
	Listen       string
	PublicURL    string // without a trailing slash; empty: http://<listen>
	AllowedHosts []string
	Sessions     string // isolated | shared
	CA, Proxy    string
	OAuth        OAuth
	Limits       Limits
	Log          Log
	Store        Store
	Metrics      MetricsSettings
	Audit        Audit
	TLS          ServerTLS // of serve
	Login        *Login    // nil: nobody logs in at the gateway
	SSE          bool      // serve the deprecated HTTP+SSE transport, too

	// Whose X-Forwarded-For is believed, for limits per address; empty: nobody's.
	TrustedProxies []netip.Prefix
}

// ServerTLS are the files of the gateway's own certificate; both or none.
type ServerTLS struct {
	Cert string `json:"cert"`
	Key  string `json:"key"`
}

// MetricsSettings are about the metrics.
type MetricsSettings struct {
	Listen string `json:"listen"` // an address of their own; empty: the gateway's, for this machine only
}

// Audit is about the audit log.
type Audit struct {
	File string `json:"file"` // empty: the ordinary log
}

// Store is where sign-ins are kept.
type Store struct {
	Type    string      // memory | file | redis; empty: what the command has as its default
	Path    string      // of the file store's directory; empty: in the user's state directory
	URL     secret.Text // of Redis: it may hold a password
	Prefix  string      // of every key in Redis
	CA      string      // a file that adds to the system's roots for Redis
	KeyFile string      // empty: for the file store a key file in the directory
	KeyEnv  string      // the environment variable that holds the keys, instead of a file
	Keyring bool        // the keys are in the operating system's keychain
}

// OAuth is about signing in to remotes.
type OAuth struct {
	Enabled           bool
	ClientName        string
	Scopes            []string // of the Client ID Metadata Document
	MetadataPath      string
	ClientMetadataURL string
	CallbackPath      string
	CallbackPort      int // of stdio's loopback listener; 0: any
}

// Limits bound what clients and browsers may ask for.
type Limits struct {
	CallbackPerMinute      int `json:"callbackPerMinute"` // from one address
	CallbackPerMinuteTotal int `json:"callbackPerMinuteTotal"`
	Sessions               int `json:"sessions"`
	FlowsPerPrincipal      int `json:"flowsPerPrincipal"`
	BodyBytes              int `json:"bodyBytes"`
	ExchangeCache          int `json:"exchangeCache"` // tokens kept that no person signed in for

	CallsInFlight  int `json:"callsInFlight"`  // of one principal
	CallsPerSecond int `json:"callsPerSecond"` // of one principal; 0: any number
}

// Log is how the gateway logs.
type Log struct {
	Level  string `json:"level"`
	Format string `json:"format"`
}

// The file's own shape, before it is checked. The names are the contract.

type configFile struct {
	Schema  string       `json:"$schema"`
	Servers struct{}     `json:"mcpServers"` // read on its own: the order counts
	Gateway settingsFile `json:"gateway"`
}

type serverFile struct {
	Type           string            `json:"type"`
	URL            string            `json:"url"`
	Headers        map[string]string `json:"headers"`
	Timeout        string            `json:"timeout"`
	Disabled       bool              `json:"disabled"`
	Prefix         *string           `json:"prefix"`
	Tools          Tools             `json:"tools"`
	AllowAddresses []string          `json:"allowAddresses"`
	TLS            TLS               `json:"tls"`
	Auth           authFile          `json:"auth"`
	Command        string            `json:"command"`
	Args           []string          `json:"args"`
	Env            map[string]string `json:"env"`
	Cwd            string            `json:"cwd"`
}

type settingsFile struct {
	Listen       string     `json:"listen"`
	PublicURL    string     `json:"publicUrl"`
	AllowedHosts []string   `json:"allowedHosts"`
	Sessions     string     `json:"sessions"`
	CA           string     `json:"ca"`
	Proxy        string     `json:"proxy"`
	OAuth        oauthFile  `json:"oauth"`
	Limits       Limits     `json:"limits"`
	Log          Log        `json:"log"`
	Store        storeFile  `json:"store"`
	Auth         *loginFile `json:"auth"`

	Metrics MetricsSettings `json:"metrics"`
	Audit   Audit           `json:"audit"`
	TLS     ServerTLS       `json:"tls"`

	TrustedProxies []string `json:"trustedProxies"`

	SSE bool `json:"sse"`
}

type oauthFile struct {
	Enabled           *bool    `json:"enabled"`
	ClientName        string   `json:"clientName"`
	Scopes            []string `json:"scopes"`
	MetadataPath      string   `json:"metadataPath"`
	ClientMetadataURL string   `json:"clientMetadataUrl"`
	CallbackPath      string   `json:"callbackPath"`
	CallbackPort      int      `json:"callbackPort"`
}

type storeFile struct {
	Type    string `json:"type"`
	Path    string `json:"path"`
	KeyFile string `json:"keyFile"`
	KeyEnv  string `json:"keyEnv"`

	URL     string `json:"url"`
	Prefix  string `json:"prefix"`
	CA      string `json:"ca"`
	Keyring bool   `json:"keyring"`
}

// ParseConfig reads a config; name is its file, which paths in it are relative
// to, and getenv looks variables up. All problems come at once, as a
// [*ConfigError].
func ParseConfig(name string, data []byte, getenv func(string) (string, bool)) (*Config, []Note, error) {
	r := &reader{data: data, getenv: getenv, offsets: map[string]int{"": 0}}
	c := &Config{dir: filepath.Dir(name)}
	if root, ok := r.parse(); ok {
		c.read(r, root)
	}
	if err := r.err(name); err != nil {
		return nil, nil, err
	}
	return c, r.notes, nil
}

// Path resolves a path that stands in the config.
func (c *Config) Path(file string) string {
	if filepath.IsAbs(file) {
		return file
	}
	return filepath.Join(c.dir, file)
}

// Running returns the remotes that run, in the file's order.
func (c *Config) Running() []*Server {
	var out []*Server
	for i := range c.Servers {
		if s := &c.Servers[i]; !s.Disabled {
			out = append(out, s)
		}
	}
	return out
}

// Named finds a remote that runs, or says what to do instead.
func (c *Config) Named(name string) (server *Server, say string) {
	var known []string
	for i := range c.Servers {
		s := &c.Servers[i]
		if s.Name != name {
			known = append(known, s.Name)
			continue
		}
		if s.Disabled {
			return nil, name + " is switched off in the config."
		}
		return s, ""
	}
	if name == "" {
		return nil, fmt.Sprintf("Which remote? There are: %s.", strings.Join(known, ", "))
	}
	return nil, fmt.Sprintf("There is no remote of that name. There are: %s.", strings.Join(known, ", "))
}

// ToolPrefix is what the remote's tool names begin with; empty: nothing.
func (s *Server) ToolPrefix() string {
	if s.Prefix != nil {
		return *s.Prefix
	}
	return s.Name
}

// SetListen overrides gateway.listen.
func (c *Config) SetListen(address string) error {
	if say := c.checkListen(address); say != "" {
		return fmt.Errorf("--listen: %s", say)
	}
	c.Gateway.Listen = address
	return nil
}

// maxSecret bounds a file that holds one secret.
const maxSecret = 64 << 10

// ReadSecretFile reads a file that holds one secret. A file that others may
// read holds none.
func ReadSecretFile(file string) (secret.Text, error) {
	f, err := os.Open(file)
	if err != nil {
		return secret.Text{}, fmt.Errorf("reading a secret: %w", err)
	}
	defer f.Close()
	// Of the open file: its name may lead to another one by now.
	info, err := f.Stat()
	if err != nil {
		return secret.Text{}, fmt.Errorf("reading a secret: %w", err)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		return secret.Text{}, fmt.Errorf("%s can be read by others (mode %#o): chmod 600 it", file, mode)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxSecret+1))
	if err != nil {
		return secret.Text{}, fmt.Errorf("reading a secret: %w", err)
	}
	if len(data) > maxSecret {
		return secret.Text{}, fmt.Errorf("%s is longer than %d bytes: it should hold one secret", file, maxSecret)
	}
	text := strings.TrimRight(string(data), "\r\n")
	if text == "" {
		return secret.Text{}, fmt.Errorf("%s is empty: it should hold a secret", file)
	}
	return secret.New(text), nil
}

func (c *Config) read(r *reader, root value) {
	members, ok := r.members(root, "")
	if !ok {
		return
	}
	var file configFile
	servers := false
	for _, m := range members {
		switch name := nameOf(m); name {
		case "$schema":
			r.decode(m.Value, name, reflect.ValueOf(&file.Schema).Elem(), nil)
		case "mcpServers":
			servers = true
			c.readServers(r, m.Value)
		case "gateway":
			r.decode(m.Value, "gateway", reflect.ValueOf(&file.Gateway).Elem(), nil)
		case "servers":
			r.problemAt(m.Name.StartOffset, name, "this is VS Code's form: rename the key to mcpServers")
			servers = true
		case "inputs":
			r.offsets[name] = m.Name.StartOffset
			r.note(name, "not a key of the gateway's, ignored")
		default:
			r.problemAt(m.Name.StartOffset, name, "unknown key%s", didYouMean(name, jsonKeys(reflect.TypeFor[configFile]())))
		}
	}
	if !servers || len(c.Servers) == 0 && len(r.problems) == 0 {
		r.problem("mcpServers", `names no remote: write "mcpServers": {"notes": {"url": "https://notes.example.com/mcp"}}`)
	}
	c.readGateway(r, &file.Gateway)
}

func (c *Config) readServers(r *reader, v value) {
	const at = "mcpServers"
	r.offsets[at] = v.StartOffset
	members, ok := r.members(v, at)
	if !ok {
		return
	}
	prefixes := map[string]string{}
	for _, m := range members {
		name := nameOf(m)
		r.offsets[join(at, name)] = m.Name.StartOffset
		server := readServer(r, join(at, name), name, m.Value)
		c.Servers = append(c.Servers, server)
		if prefix := sanitize(server.ToolPrefix()); !server.Disabled && prefix != "" {
			if other, taken := prefixes[prefix]; taken {
				r.note(join(at, name), "its tools have the same prefix as those of %s: where names meet, the later one gets a suffix", other)
			}
			prefixes[prefix] = name
		}
	}
}

func readServer(r *reader, at, name string, v value) Server {
	var f serverFile
	f.Disabled = boolMember(v, "disabled")
	// What does not run needs no variables.
	r.lenient = f.Disabled
	r.unset = 0
	defer func() { r.lenient = false }()
	known := jsonKeys(reflect.TypeFor[serverFile]())
	v = clientForms(r, at, v)
	r.decode(v, at, reflect.ValueOf(&f).Elem(), func(path, key string) {
		r.note(path, "not a key of the gateway's, ignored%s", didYouMean(key, known))
	})
	s := Server{Name: name, Disabled: f.Disabled, Prefix: f.Prefix, Tools: f.Tools, TLS: f.TLS}
	checkName(r, at, &s)
	s.Type = checkType(r, at, &f, hasMember(v, "url"))
	if f.Command != "" && f.URL != "" {
		r.problem(at+".command", `"url" and "command" exclude each other`)
	}
	switch s.Type {
	case "stdio":
		switch {
		case f.Command != "" || r.given(at+".command"):
		case f.Type != "":
			r.problem(at, `has no "command"`)
		default:
			r.problem(at, `has neither "url" nor "command"`)
		}
		s.Command, s.Args, s.Dir, s.Auth.Type = f.Command, f.Args, f.Cwd, "none"
		s.Env = checkEnv(r, at+".env", f.Env)
		s.Timeout = checkTimeout(r, at+".timeout", f.Timeout)
		checkTools(r, at+".tools", f.Tools)
		for key, given := range map[string]bool{"headers": f.Headers != nil, "allowAddresses": f.AllowAddresses != nil, "tls": f.TLS != TLS{}, "auth": r.given(at + ".auth")} {
			if given {
				r.problem(join(at, key), `is for remotes with a "url"; a local program has none`)
			}
		}
		return s
	}
	if r.unset > 0 {
		return s // its values are not those that would be checked
	}
	s.AllowAddresses = checkAddresses(r, at+".allowAddresses", f.AllowAddresses)
	s.URL = checkRemoteURL(r, at+".url", f.URL, s.AllowAddresses)
	s.Headers = checkHeaders(r, at+".headers", f.Headers)
	s.Timeout = checkTimeout(r, at+".timeout", f.Timeout)
	checkTools(r, at+".tools", f.Tools)
	if (f.TLS.Cert == "") != (f.TLS.Key == "") {
		r.problem(at+".tls", `"cert" and "key" go together`)
	}
	s.Auth = checkAuth(r, at+".auth", &f.Auth, s.AllowAddresses)
	return s
}

func checkTimeout(r *reader, at, text string) time.Duration {
	if text == "" {
		return 60 * time.Second
	}
	d, err := time.ParseDuration(text)
	if err != nil || d <= 0 || d > time.Hour {
		r.problem(at, `must be a duration such as "60s", at most 1h`)
	}
	return d
}

func checkTools(r *reader, at string, tools Tools) {
	for list, patterns := range map[string][]string{"allow": tools.Allow, "deny": tools.Deny} {
		for i, pattern := range patterns {
			if _, err := path.Match(pattern, ""); err != nil || pattern == "" {
				r.problem(fmt.Sprintf("%s.%s.%d", at, list, i), "is not a pattern: * stands for anything, ? for one character")
			}
		}
	}
}

func checkEnv(r *reader, at string, env map[string]string) map[string]secret.Text {
	out := make(map[string]secret.Text, len(env))
	for name, value := range env {
		if name == "" || strings.ContainsAny(name, "=\x00") || strings.Contains(value, "\x00") {
			r.problem(join(at, name), "is not an environment variable")
			continue
		}
		out[name] = secret.New(value)
	}
	return out
}

// clientForms translates what clients write in their own way in an entry: the
// URL under another name, a timeout as a number, a list of tools.
func clientForms(r *reader, at string, v value) value {
	o, ok := v.Value.(*object)
	if !ok {
		return v
	}
	count := map[string]int{}
	for _, m := range o.Members {
		count[nameOf(m)]++
	}
	hasURL := count["url"] > 0
	kept := *o
	kept.Members = nil
	for _, m := range o.Members {
		name := nameOf(m)
		kind := m.Value.Value.Kind()
		foreign := name == "timeout" && kind == '0' || name == "tools" && kind == '[' || name == "auth" && textMember(v, name) == "oauth"
		switch {
		case count[name] > 1: // refused where it is read
		case foreign:
			r.offsets[join(at, name)] = m.Name.StartOffset
			r.note(join(at, name), "in a form that only clients know, ignored")
			continue
		case !hasURL && (name == "serverUrl" || name == "httpUrl"):
			hasURL = true
			r.offsets[join(at, name)] = m.Name.StartOffset
			r.note(join(at, name), `a client's word for "url", read as that`)
			m.Name.Value = hujson.String("url")
		}
		kept.Members = append(kept.Members, m)
	}
	v.Value = &kept
	return v
}

func checkName(r *reader, at string, s *Server) {
	switch {
	case s.Name == "" || utf8.RuneCountInString(s.Name) > 64 || strings.ContainsFunc(s.Name, func(c rune) bool { return unicode.IsControl(c) || c == '/' }):
		r.problem(at, "a remote's name is 1 to 64 characters, without control characters and slashes")
	case sanitize(s.Name) == ownPrefix:
		r.problem(at, "a remote may not be called %q: that is the gateway's own prefix", ownPrefix)
	case s.Prefix != nil && sanitize(*s.Prefix) == ownPrefix:
		r.problem(at+".prefix", "%q is the gateway's own prefix", ownPrefix)
	case s.Prefix != nil && utf8.RuneCountInString(*s.Prefix) > 40:
		r.problem(at+".prefix", "is longer than 40 characters, which leaves too few for the tools' names")
	}
}

// checkType returns http, sse or stdio; without a type, what else is there decides.
func checkType(r *reader, at string, f *serverFile, hasURL bool) string {
	switch f.Type {
	case "http", "streamable-http", "streamableHttp", "sse":
		if !hasURL {
			r.problem(at, `has no "url"`)
		}
		if f.Type == "sse" {
			return "sse"
		}
		return "http"
	case "stdio", "local":
		return "stdio"
	case "":
		if hasURL {
			return "http"
		}
		return "stdio"
	}
	r.problem(at+".type", "must be http, sse or stdio")
	return "http"
}

func checkRemoteURL(r *reader, at, raw string, allow []netip.Prefix) *url.URL {
	if !r.given(at) {
		return &url.URL{} // said already
	}
	u, err := url.Parse(raw)
	switch {
	case err != nil || !hasHost(u) || u.Scheme != "http" && u.Scheme != "https":
		r.problem(at, "must be an http or https URL")
		return &url.URL{}
	case u.User != nil:
		r.problem(at, "must not hold a user name or password: use headers or auth")
	case strings.Contains(raw, "#"):
		r.problem(at, "must not have a fragment (#…)")
	case u.Scheme == "http" && !plainAllowed(u.Hostname(), allow):
		r.problem(at, "plain http is for loopback only: use https, or list the remote's address in allowAddresses")
	}
	return u
}

// hasHost reports whether a URL names a host and, if it names a port, one that
// there is.
func hasHost(u *url.URL) bool {
	return u.Hostname() != "" && (u.Port() == "" || isPort(u.Port()))
}

func isPort(s string) bool {
	_, err := strconv.ParseUint(s, 10, 16)
	return err == nil
}

// plainAllowed reports whether http could be allowed there; what a name leads
// to is judged when it is dialed.
func plainAllowed(host string, allow []netip.Prefix) bool {
	if isLoopbackName(host) {
		return true
	}
	if addr, err := netip.ParseAddr(host); err == nil {
		return slices.ContainsFunc(allow, func(p netip.Prefix) bool { return p.Contains(addr.Unmap()) })
	}
	return len(allow) > 0
}

func checkAddresses(r *reader, at string, list []string) []netip.Prefix {
	var out []netip.Prefix
	for i, s := range list {
		p, err := netip.ParsePrefix(s)
		if addr, addrErr := netip.ParseAddr(s); addrErr == nil {
			p, err = netip.PrefixFrom(addr, addr.BitLen()), nil
		}
		if err != nil {
			r.problem(fmt.Sprintf("%s.%d", at, i), "must be an address or a network, such as 10.0.0.0/8")
			continue
		}
		out = append(out, p.Masked())
	}
	return out
}

func checkHeaders(r *reader, at string, headers map[string]string) map[string]secret.Text {
	out := make(map[string]secret.Text, len(headers))
	spelled := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(headers)) {
		value, canonical := headers[name], http.CanonicalHeaderKey(name)
		if !isToken(name) {
			r.problem(join(at, name), "is not a header's name")
		}
		if other, twice := spelled[canonical]; twice {
			r.problem(join(at, name), "is the same header as %q", other)
		}
		spelled[canonical] = name
		if strings.ContainsFunc(value, func(c rune) bool { return c < ' ' && c != '\t' || c == 0x7f }) {
			r.problem(join(at, name), "holds control characters")
		}
		out[name] = secret.New(value)
	}
	return out
}

// isToken reports whether s is a token of RFC 9110, section 5.6.2.
func isToken(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(c rune) bool {
		return c <= ' ' || c >= 0x7f || strings.ContainsRune(`"(),/:;<=>?@[\]{}`, c)
	})
}

// checkPath checks a path that the gateway is to serve.
func checkPath(r *reader, at, p string) {
	if p == "" {
		return
	}
	taken := []string{"/mcp", "/connect", "/healthz", "/readyz", "/metrics", "/login", "/logout", "/signin", "/signout", "/sse", "/messages", "/.well-known/oauth-protected-resource"}
	switch {
	case !strings.HasPrefix(p, "/") || p == "/" || path.Clean(p) != p ||
		strings.ContainsFunc(p, func(c rune) bool { return c <= ' ' || c >= 0x7f || strings.ContainsRune(`{}?#%\"<>`, c) }):
		r.problem(at, "must be a plain path that begins with a slash, such as /oauth/callback")
	case slices.ContainsFunc(taken, func(t string) bool { return p == t || strings.HasPrefix(p, t+"/") }):
		r.problem(at, "is a path that the gateway needs itself")
	}
}

// checkCallbackPath checks the path of a redirect URI.
func checkCallbackPath(r *reader, at, p string) {
	if strings.HasPrefix(p, "/.well-known/") {
		r.problem(at, "is among the well-known paths, which are for documents")
	}
	checkPath(r, at, p)
}

func (c *Config) readGateway(r *reader, f *settingsFile) {
	const at = "gateway"
	g := &c.Gateway
	*g = Settings{
		Listen: or(f.Listen, "127.0.0.1:8080"), PublicURL: strings.TrimSuffix(f.PublicURL, "/"), AllowedHosts: f.AllowedHosts,
		Sessions: or(f.Sessions, "isolated"), SSE: f.SSE, CA: f.CA, Proxy: f.Proxy,
		OAuth: OAuth{
			Enabled: f.OAuth.Enabled == nil || *f.OAuth.Enabled, ClientName: or(f.OAuth.ClientName, "Gatehouse"), Scopes: f.OAuth.Scopes,
			MetadataPath: or(f.OAuth.MetadataPath, "/.well-known/oauth-client.json"), ClientMetadataURL: f.OAuth.ClientMetadataURL,
			CallbackPath: or(f.OAuth.CallbackPath, "/oauth/callback"), CallbackPort: f.OAuth.CallbackPort,
		},
		Limits: f.Limits,
		Log:    Log{or(f.Log.Level, "info"), or(f.Log.Format, "auto")},
		Store: Store{
			Type: f.Store.Type, Path: f.Store.Path, URL: secret.New(f.Store.URL), Prefix: f.Store.Prefix, CA: f.Store.CA,
			KeyFile: f.Store.KeyFile, KeyEnv: f.Store.KeyEnv, Keyring: f.Store.Keyring,
		},
		Metrics: f.Metrics, Audit: f.Audit, TLS: f.TLS,
		TrustedProxies: checkAddresses(r, at+".trustedProxies", f.TrustedProxies),
	}
	if _, port, err := net.SplitHostPort(g.Metrics.Listen); g.Metrics.Listen != "" && (err != nil || !isPort(port)) {
		r.problem(at+".metrics.listen", "must be host:port, such as 127.0.0.1:9090")
	}
	if (g.TLS.Cert == "") != (g.TLS.Key == "") {
		r.problem(at+".tls", `"cert" and "key" go together`)
	}
	checkPublicURL(r, at+".publicUrl", g.PublicURL)
	g.PublicURL = withoutDefaultPort(g.PublicURL)
	for i, host := range g.AllowedHosts {
		if u, err := url.Parse("//" + host); err != nil || u.Host != host || !hasHost(u) {
			r.problem(fmt.Sprintf("%s.allowedHosts.%d", at, i), "must be a host, with a port or without")
		}
	}
	oneOf(r, at+".sessions", f.Sessions, "isolated", "shared")
	if u, err := url.Parse(g.Proxy); g.Proxy != "" && (err != nil || !hasHost(u) || !slices.Contains([]string{"http", "https", "socks5"}, u.Scheme)) {
		r.problem(at+".proxy", "must be a URL of http, https or socks5, such as http://proxy.example.com:3128")
	}
	checkStore(r, at+".store", &g.Store)
	c.checkLogin(r, at+".auth", f.Auth)
	if say := c.checkListen(g.Listen); say != "" {
		r.problem(at+".listen", "%s", say)
	}
	if c.Users() && r.given(at+".sessions") {
		r.problem(at+".sessions", "has no effect where gateway.auth tells users apart")
	}
	c.checkGroups(r)
	checkPath(r, at+".oauth.metadataPath", g.OAuth.MetadataPath)
	checkCallbackPath(r, at+".oauth.callbackPath", g.OAuth.CallbackPath)
	if g.OAuth.MetadataPath == g.OAuth.CallbackPath || strings.HasPrefix(g.OAuth.MetadataPath, g.OAuth.CallbackPath+"/") {
		r.problem(at+".oauth.metadataPath", "is where callbacks arrive")
	}
	for i := range c.Servers {
		s := &c.Servers[i]
		if p := s.Auth.CallbackPath; p != "" && (p == g.OAuth.MetadataPath || path.Dir(p) == g.OAuth.CallbackPath) {
			r.problem(join("mcpServers", s.Name)+".auth.callbackPath", "is a path that the gateway needs itself")
		}
	}
	if u, err := url.Parse(g.OAuth.ClientMetadataURL); g.OAuth.ClientMetadataURL != "" &&
		(err != nil || u.Scheme != "https" || u.Host == "" || u.Path == "" || u.Path == "/" || u.Fragment != "" || u.User != nil) {
		// "client_id [...] MUST use the https scheme and contain a path component"
		r.problem(at+".oauth.clientMetadataUrl", "must be an https URL with a path")
	}
	if p := g.OAuth.CallbackPort; p < 0 || p > 65535 {
		r.problem(at+".oauth.callbackPort", "must be a port, or 0 for any")
	}
	oneOf(r, at+".log.level", f.Log.Level, "debug", "info", "warn", "error")
	oneOf(r, at+".log.format", f.Log.Format, "auto", "text", "json")
	for _, limit := range []struct {
		name  string
		value *int
		def   int
		min   int
		max   int
	}{
		{"callbackPerMinute", &g.Limits.CallbackPerMinute, 20, 1, 1_000_000},
		{"callbackPerMinuteTotal", &g.Limits.CallbackPerMinuteTotal, 500, 1, 1_000_000},
		{"sessions", &g.Limits.Sessions, 10_000, 1, 1_000_000},
		{"flowsPerPrincipal", &g.Limits.FlowsPerPrincipal, 10, 1, 1_000},
		{"bodyBytes", &g.Limits.BodyBytes, 4 << 20, 1, 1 << 30},
		{"callsInFlight", &g.Limits.CallsInFlight, 64, 1, 100_000},
		{"callsPerSecond", &g.Limits.CallsPerSecond, 0, 0, 100_000},
		{"exchangeCache", &g.Limits.ExchangeCache, 10_000, 1, 1_000_000},
	} {
		path := at + ".limits." + limit.name
		if !r.given(path) {
			*limit.value = limit.def
		} else if *limit.value < limit.min || *limit.value > limit.max {
			r.problem(path, "must be from %d to %d", limit.min, limit.max)
		}
	}
}

func checkStore(r *reader, at string, s *Store) {
	switch s.Type {
	case "memory", "file", "redis":
	default:
		if r.given(at + ".type") {
			r.problem(at+".type", "must be memory, file or redis")
		}
	}
	keyed := s.KeyFile != "" || s.KeyEnv != ""
	switch {
	case s.Keyring && s.Type != "file":
		r.problem(at+".keyring", `is for the store of one user: add "type": "file"`)
	case s.Keyring && keyed:
		r.problem(at+".keyring", `excludes "keyFile" and "keyEnv"`)
	case s.Type == "redis" && s.Path != "":
		r.problem(at+".path", `is of the file store: Redis is at its "url"`)
	case s.Type == "redis" && s.URL.IsEmpty():
		r.problem(at, `needs the "url" of the Redis server, such as rediss://user:${PASSWORD}@redis.example.com:6379/0`)
	case s.Type == "redis" && !keyed:
		r.problem(at, `needs a "keyFile" or "keyEnv", the same for all replicas: what is in Redis is sealed with it`)
	case s.Type != "redis" && (!s.URL.IsEmpty() || s.CA != ""):
		r.problem(at, `has settings of a Redis store: add "type": "redis"`)
	case s.Type != "redis" && s.Type != "file" && (s.Path != "" || keyed):
		r.problem(at, `has settings of a file store: add "type": "file"`)
	}
	if s.Prefix == "" {
		s.Prefix = "gatehouse:"
	} else if strings.ContainsAny(s.Prefix, "{} \t\r\n") || len(s.Prefix) > 64 {
		r.problem(at+".prefix", "is at most 64 characters, without braces and blanks")
	}
	if s.KeyFile != "" && s.KeyEnv != "" {
		r.problem(at, `"keyFile" and "keyEnv" exclude each other`)
	}
}

// Users reports whether clients and browsers have to say who they are, when the
// gateway is served over HTTP.
func (c *Config) Users() bool {
	login := c.Gateway.Login
	return login != nil && login.IDTokenFile == ""
}

// checkListen refuses what others could reach: without inbound auth everybody
// who connects would act as this user.
func (c *Config) checkListen(address string) string {
	host, port, err := net.SplitHostPort(address)
	// The address is not repeated: it may have come from a variable.
	if err != nil || !isPort(port) {
		return "must be host:port, such as 127.0.0.1:8080"
	}
	switch {
	case isLoopbackName(host):
	case !c.Users():
		return "an address that other machines can reach needs gateway.auth, which says who may connect: set it, or listen on loopback, such as 127.0.0.1:8080"
	case c.Gateway.PublicURL == "":
		return "an address that other machines can reach needs gateway.publicUrl, by which they reach it"
	}
	return ""
}

func checkPublicURL(r *reader, at, raw string) {
	if raw == "" {
		return
	}
	u, err := url.Parse(raw)
	switch {
	case err != nil || !hasHost(u) || u.Scheme != "http" && u.Scheme != "https" || u.User != nil:
		r.problem(at, "must be an https URL")
	case u.Path != "" || strings.ContainsAny(raw, "?#"):
		r.problem(at, "must be an origin: no path, query or fragment")
	case u.Scheme == "http" && !isLoopbackName(u.Hostname()):
		r.problem(at, "plain http is for loopback only: use https")
	}
}

// withoutDefaultPort is the origin as browsers write it.
func withoutDefaultPort(origin string) string {
	for scheme, port := range map[string]string{"https://": ":443", "http://": ":80"} {
		if strings.HasPrefix(origin, scheme) {
			return strings.TrimSuffix(origin, port)
		}
	}
	return origin
}

// oneOf checks a value that has a default where it is not given.
func oneOf(r *reader, at, value string, allowed ...string) {
	if r.given(at) && !slices.Contains(allowed, value) {
		r.problem(at, "must be one of %s", strings.Join(allowed, ", "))
	}
}

func or(s, fallback string) string {
	if s == "" {
		return fallback
	}
	return s
}
