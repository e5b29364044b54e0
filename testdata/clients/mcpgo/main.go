// The client of github.com/mark3labs/mcp-go, in both eras over streamable HTTP,
// and over stdio: what it sees of the reference server "everything" through the
// gateway must be what it sees without it, and the demo's sign-in must work.
// It is a module of its own so that the product does not depend on its client.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/mark3labs/mcp-go/client"
	"github.com/mark3labs/mcp-go/mcp"
)

const (
	legacy = "2025-11-25"
	modern = "2026-07-28"
	prefix = "everything_"
)

var failed bool

func check(who, what string, err error) {
	if err != nil {
		failed = true
		fmt.Printf("FAIL  %s: %s: %v\n", who, what, err)
		return
	}
	fmt.Printf("ok    %s: %s\n", who, what)
}

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	remote, gateway, demo, binary, config := os.Args[1], os.Args[2], os.Args[3], os.Args[4], os.Args[5]
	direct, err := overHTTP(ctx, remote, legacy)
	if err != nil {
		check("mcp-go", "connect to the remote", err)
		os.Exit(1)
	}
	defer direct.Close()
	for _, version := range []string{legacy, modern} {
		who := "mcp-go, " + version
		c, err := overHTTP(ctx, gateway, version)
		check(who, "connect", err)
		if err == nil {
			compareAll(ctx, who, direct, c)
			check(who, "end the session", c.Close())
		}
		c, err = overHTTP(ctx, demo, version)
		check(who, "connect to the demo", err)
		if err == nil {
			check(who, "a call asks for the sign-in, and works after it", signIn(ctx, c))
			c.Close()
		}
	}
	who := "mcp-go, stdio"
	c, err := client.NewStdioMCPClient(binary, os.Environ(), "stdio", "--config", config)
	if err == nil {
		err = c.Start(ctx) // it runs already, but hears no notifications yet
	}
	if err == nil {
		err = initialize(ctx, c, legacy)
	}
	check(who, "connect", err)
	if err == nil {
		compareAll(ctx, who, direct, c)
		check(who, "a call asks for the sign-in, and works after it", signIn(ctx, c))
		check(who, "end the session", c.Close())
	}
	if failed {
		os.Exit(1)
	}
}

func overHTTP(ctx context.Context, url, version string) (*client.Client, error) {
	c, err := client.NewStreamableHttpClient(url)
	if err != nil {
		return nil, err
	}
	if err := c.Start(ctx); err != nil {
		return nil, err
	}
	return c, initialize(ctx, c, version)
}

func initialize(ctx context.Context, c *client.Client, version string) error {
	request := mcp.InitializeRequest{}
	request.Params.ProtocolVersion = version
	request.Params.ClientInfo = mcp.Implementation{Name: "clients-mcp-go", Version: "1"}
	if _, err := c.Initialize(ctx, request); err != nil {
		return err
	}
	if got := c.ProtocolVersion(); got != version {
		return fmt.Errorf("protocol version %s was agreed on, want %s", got, version)
	}
	return nil
}

// see is one thing that a client does, and what it saw.
type see func(ctx context.Context, c *client.Client, prefix string) (any, error)

func call(name string, arguments map[string]any) see {
	return func(ctx context.Context, c *client.Client, prefix string) (any, error) {
		request := mcp.CallToolRequest{}
		request.Params.Name, request.Params.Arguments = prefix+name, arguments
		return c.CallTool(ctx, request)
	}
}

func compareAll(ctx context.Context, who string, direct, gateway *client.Client) {
	for _, step := range []struct {
		what string
		see  see
	}{
		{"list tools", func(ctx context.Context, c *client.Client, prefix string) (any, error) {
			list, err := c.ListTools(ctx, mcp.ListToolsRequest{})
			if err != nil {
				return nil, err
			}
			var tools []mcp.Tool
			for _, tool := range list.Tools {
				if name, ok := strings.CutPrefix(tool.Name, prefix); ok && !strings.HasPrefix(name, "gateway_") {
					tool.Name = name
					tools = append(tools, tool)
				}
			}
			slices.SortFunc(tools, func(a, b mcp.Tool) int { return strings.Compare(a.Name, b.Name) })
			return tools, nil
		}},
		{"call a tool", call("echo", map[string]any{"message": "grüße, 世界 <&>\n"})},
		{"structured content", call("get-structured-content", map[string]any{"location": "Chicago"})},
		{"annotated content", call("get-annotated-message", map[string]any{"messageType": "error", "includeImage": true})},
		{"resource links", call("get-resource-links", map[string]any{"count": 3})},
		{"a tool that fails", call("get-sum", map[string]any{"a": "x"})},
		{"progress", progress},
		{"list resources", func(ctx context.Context, c *client.Client, _ string) (any, error) {
			list, err := c.ListResources(ctx, mcp.ListResourcesRequest{})
			if err != nil {
				return nil, err
			}
			list.Resources = slices.DeleteFunc(list.Resources, func(r mcp.Resource) bool {
				return r.URI == "auth://status" // the gateway's own
			})
			return list, nil
		}},
		{"read a resource", func(ctx context.Context, c *client.Client, _ string) (any, error) {
			request := mcp.ReadResourceRequest{}
			request.Params.URI = "demo://resource/static/document/features.md"
			return c.ReadResource(ctx, request)
		}},
		{"list prompts", func(ctx context.Context, c *client.Client, prefix string) (any, error) {
			list, err := c.ListPrompts(ctx, mcp.ListPromptsRequest{})
			if err != nil {
				return nil, err
			}
			for i := range list.Prompts {
				list.Prompts[i].Name = strings.TrimPrefix(list.Prompts[i].Name, prefix)
			}
			slices.SortFunc(list.Prompts, func(a, b mcp.Prompt) int { return strings.Compare(a.Name, b.Name) })
			return list.Prompts, nil
		}},
		{"get a prompt", func(ctx context.Context, c *client.Client, prefix string) (any, error) {
			request := mcp.GetPromptRequest{}
			request.Params.Name, request.Params.Arguments = prefix+"args-prompt", map[string]string{"city": "Zürich", "state": "ZH"}
			return c.GetPrompt(ctx, request)
		}},
		{"a prompt that fails", func(ctx context.Context, c *client.Client, prefix string) (any, error) {
			request := mcp.GetPromptRequest{}
			request.Params.Name = prefix + "args-prompt"
			_, err := c.GetPrompt(ctx, request)
			return map[string]bool{"refused": err != nil}, nil
		}},
	} {
		check(who, step.what, func() error {
			want, err := step.see(ctx, direct, "")
			if err != nil {
				return fmt.Errorf("directly: %w", err)
			}
			got, err := step.see(ctx, gateway, prefix)
			if err != nil {
				return err
			}
			if want, got := comparable(want), comparable(got); !reflect.DeepEqual(want, got) {
				return fmt.Errorf("it sees\n%v\nthrough the gateway, and without it\n%v", got, want)
			}
			return nil
		}())
	}
}

// progress waits for the notifications, which this client hands on from another
// goroutine than the result.
func progress(ctx context.Context, c *client.Client, prefix string) (any, error) {
	const steps = 3
	seen := make(chan mcp.JSONRPCNotification, 2*steps)
	var over atomic.Bool
	defer over.Store(true)
	c.OnNotification(func(n mcp.JSONRPCNotification) {
		if n.Method == "notifications/progress" && !over.Load() {
			seen <- n
		}
	})
	request := mcp.CallToolRequest{}
	request.Params.Name = prefix + "trigger-long-running-operation"
	request.Params.Arguments = map[string]any{"duration": 0.3, "steps": steps}
	request.Params.Meta = &mcp.Meta{ProgressToken: "mine"}
	result, err := c.CallTool(ctx, request)
	if err != nil {
		return nil, err
	}
	out := []any{result}
	for range steps {
		select {
		case n := <-seen:
			out = append(out, n.Params.AdditionalFields)
		case <-time.After(5 * time.Second):
			return nil, errors.New("a progress notification is missing")
		}
	}
	return out, nil
}

// comparable is a value as JSON, without what protocol 2026-07-28 adds to a
// result between client and gateway.
func comparable(v any) any {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	var out any
	if err := json.Unmarshal(data, &out); err != nil {
		return err
	}
	return without(out)
}

func without(v any) any {
	switch v := v.(type) {
	case []any:
		for i := range v {
			v[i] = without(v[i])
		}
	case map[string]any:
		for key := range v {
			switch key {
			case "resultType", "ttlMs", "cacheScope", "io.modelcontextprotocol/serverInfo":
				delete(v, key)
				continue
			}
			v[key] = without(v[key])
			if members, ok := v[key].(map[string]any); ok && key == "_meta" && len(members) == 0 {
				delete(v, key)
			}
		}
	}
	return v
}

// signIn is one round with the demo's remote.
func signIn(ctx context.Context, c *client.Client) error {
	add := func() (*mcp.CallToolResult, error) {
		request := mcp.CallToolRequest{}
		request.Params.Name, request.Params.Arguments = "notes_add_note", map[string]any{"text": "mcp-go"}
		return c.CallTool(ctx, request)
	}
	logout := mcp.CallToolRequest{}
	logout.Params.Name, logout.Params.Arguments = "gateway_logout", map[string]any{"remote": "notes"}
	if _, err := c.CallTool(ctx, logout); err != nil {
		return err
	}
	asked, err := add()
	if err != nil {
		return err
	}
	var required struct {
		Status string `json:"status"`
		URL    string `json:"auth_url"`
	}
	if len(asked.Content) != 2 {
		return fmt.Errorf("the call asked for no sign-in: %v", asked)
	}
	if text, ok := asked.Content[1].(mcp.TextContent); !ok || json.Unmarshal([]byte(text.Text), &required) != nil || required.Status != "auth_required" {
		return fmt.Errorf("the call asked for no sign-in: %v", asked)
	}
	if err := browse(ctx, required.URL); err != nil {
		return err
	}
	if done, err := add(); err != nil || done.IsError {
		return fmt.Errorf("the call after the sign-in: %v %w", done, err)
	}
	return nil
}

var (
	form  = regexp.MustCompile(`<form method="post" action="([^"]*)"`)
	field = regexp.MustCompile(`<input [^>]*name="([^"]*)"(?:[^>]*? value="([^"]*)")?`)
)

// browse opens a sign-in link as a person with the demo's password does.
func browse(ctx context.Context, link string) error {
	jar, err := cookiejar.New(nil)
	if err != nil {
		return err
	}
	browser := &http.Client{Jar: jar}
	get, err := http.NewRequestWithContext(ctx, http.MethodGet, link, nil)
	if err != nil {
		return err
	}
	page, at, err := open(browser, get)
	if err != nil {
		return err
	}
	action := form.FindStringSubmatch(page)
	if action == nil {
		return fmt.Errorf("the link leads to no form: %s", page)
	}
	values := url.Values{"action": {"signin"}}
	for _, f := range field.FindAllStringSubmatch(page, -1) {
		values.Set(f[1], html.UnescapeString(f[2]))
	}
	to, err := at.Parse(action[1])
	if err != nil {
		return err
	}
	post, err := http.NewRequestWithContext(ctx, http.MethodPost, to.String(), strings.NewReader(values.Encode()))
	if err != nil {
		return err
	}
	post.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	if page, _, err = open(browser, post); err != nil {
		return err
	}
	if !strings.Contains(page, "You are signed in") {
		return fmt.Errorf("the sign-in ended at: %s", page)
	}
	return nil
}

func open(browser *http.Client, r *http.Request) (page string, at *url.URL, err error) {
	resp, err := browser.Do(r)
	if err != nil {
		return "", nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return string(body), resp.Request.URL, err
}
