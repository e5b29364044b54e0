package guard

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"code.dny.dev/ssrf"
)

// nat64 is the prefix behind which IPv4 addresses hide in an IPv6-only network.
var nat64 = netip.MustParsePrefix("64:ff9b::/96")

var loopback = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}

// public is the guardian without exceptions.
var public = ssrf.New(ssrf.WithAnyPort())

// addresses judges URLs and addresses by one policy.
type addresses struct {
	allow     []netip.Prefix // loopback's included, if that is allowed
	names     bool           // a name may lead to an allowed address
	localhost bool
}

func newAddresses(p Policy) addresses {
	a := addresses{allow: slices.Clone(p.Allow), names: len(p.Allow) > 0, localhost: p.Loopback}
	if p.Loopback {
		a.allow = append(a.allow, loopback...)
	}
	return a
}

// dialCheck judges an address that is about to be dialed.
type dialCheck func(netip.Addr) error

// checkPlain is the [dialCheck] of plain http: the exceptions alone.
func (a *addresses) checkPlain(ip netip.Addr) error {
	if a.excepted(ip) {
		return nil
	}
	return fmt.Errorf("%w: plain http to %s", ErrBlocked, ip)
}

// checkSecure is the [dialCheck] of https: public addresses and the exceptions.
func (a *addresses) checkSecure(ip netip.Addr) error {
	if a.excepted(ip) {
		return nil
	}
	if nat64.Contains(ip) {
		// The translator would hand the packet to the embedded address.
		b := ip.As16()
		ip = netip.AddrFrom4([4]byte(b[12:]))
	}
	if err := public.SafeAddr(ip); err != nil {
		return fmt.Errorf("%w: %w", ErrBlocked, err)
	}
	return nil
}

func (a *addresses) excepted(ip netip.Addr) bool {
	return !nat64.Contains(ip) && slices.ContainsFunc(a.allow, func(p netip.Prefix) bool { return p.Contains(ip) })
}

// dial returns the dialer of a transport. What check refuses never sees a packet.
func (cs *Clients) dial(check dialCheck) func(ctx context.Context, network, addr string) (net.Conn, error) {
	free := net.Dialer{Timeout: connectTimeout, Resolver: cs.resolver}
	guarded := free
	guarded.Control = func(_, address string, _ syscall.RawConn) error {
		ap, err := netip.ParseAddrPort(address)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrBlocked, err)
		}
		return check(ap.Addr().Unmap())
	}
	proxy := proxyAddress(cs.config.Proxy)
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		// The operator named the proxy; everything behind it is the proxy's to dial.
		if proxy != "" && addr == proxy {
			return free.DialContext(ctx, network, addr)
		}
		return guarded.DialContext(ctx, network, addr)
	}
}

// proxyAddress returns what a transport dials to reach the proxy.
func proxyAddress(u *url.URL) string {
	if u == nil {
		return ""
	}
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443", "socks5": "1080", "socks5h": "1080"}[u.Scheme]
	}
	return net.JoinHostPort(u.Hostname(), port)
}

// checkURL is [Client.CheckURL].
func (a *addresses) checkURL(u *url.URL) error {
	refuse := func(why string) error { return fmt.Errorf("%w: %s", ErrBlocked, why) }
	host := u.Hostname()
	switch {
	case u.Scheme != "http" && u.Scheme != "https":
		return refuse("not an http or https URL")
	case u.Opaque != "" || host == "":
		return refuse("the URL names no host")
	case u.User != nil:
		return refuse("the URL holds a user name")
	case u.Fragment != "" || u.RawFragment != "":
		return refuse("the URL has a fragment")
	case hasControl(u.Path) || hasControl(u.RawPath) || hasControl(u.RawQuery):
		return refuse("the URL holds control characters")
	}
	if port := u.Port(); port != "" {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return refuse("the URL's port is not a number from 1 to 65535")
		}
	} else if strings.HasSuffix(u.Host, ":") {
		return refuse("the URL's port is empty")
	}

	if ip, err := netip.ParseAddr(host); err == nil {
		switch {
		case ip.Zone() != "":
			return refuse("an address with a zone")
		case ip.Is4In6():
			return refuse("an IPv4 address in IPv6 notation")
		case u.Scheme == "http":
			return a.checkPlain(ip)
		default:
			return a.checkSecure(ip)
		}
	}
	switch {
	case !isName(host):
		return refuse("the URL's host is not a name")
	case isLocalhost(host):
		if !a.localhost {
			return refuse("localhost")
		}
		return nil
	case u.Scheme == "http" && !a.names:
		return refuse("plain http")
	}
	return nil
}

// isName reports whether the host is a DNS name. Names that some resolvers
// take for an address (0x7f.1, 2130706433, 017700000001) are none.
func isName(host string) bool {
	host = strings.TrimSuffix(host, ".")
	if host == "" || len(host) > 253 {
		return false
	}
	var last string
	for last = range strings.SplitSeq(host, ".") {
		if last == "" || len(last) > 63 {
			return false
		}
		for i := range len(last) {
			switch c := last[i]; {
			case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '-', c == '_':
			default:
				return false
			}
		}
	}
	// WHATWG URL, "ends in a number": then it is an IPv4 address or an error.
	return strings.Trim(last, "0123456789") != "" && !isHexNumber(last)
}

func isHexNumber(s string) bool {
	if len(s) < 2 || s[0] != '0' || s[1] != 'x' && s[1] != 'X' {
		return false
	}
	return strings.Trim(s[2:], "0123456789abcdefABCDEF") == ""
}

func isLocalhost(host string) bool {
	return strings.EqualFold(strings.TrimSuffix(host, "."), "localhost")
}

func isLoopbackHost(host string) bool {
	if ip, err := netip.ParseAddr(host); err == nil {
		return ip.Unmap().IsLoopback()
	}
	return isLocalhost(host)
}

func hasControl(s string) bool {
	return strings.ContainsFunc(s, func(r rune) bool { return r < 0x20 || r == 0x7f })
}
