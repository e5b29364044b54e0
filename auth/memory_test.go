package auth_test

import (
	"fmt"
	"strconv"
	"testing"
	"time"

	"gatehouse/auth"
	"gatehouse/auth/storetest"
)

func TestMemory(t *testing.T) {
	storetest.Run(t, func(t *testing.T, c storetest.Config) (a, b auth.Store) {
		m := auth.NewMemory(auth.MemoryConfig{MaxRecords: c.MaxRecords, Now: c.Now})
		return m, m
	})
}

// A write must not become slower with what is there.
func BenchmarkMemoryPut(b *testing.B) {
	for _, n := range []int{100, 100_000} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			m := auth.NewMemory(auth.MemoryConfig{MaxRecords: map[string]int{"b": n + 1}})
			expires := time.Now().Add(time.Hour)
			for i := range n {
				if _, err := m.Put(b.Context(), "b", fmt.Sprint(i), nil, 0, expires.Add(time.Duration(i))); err != nil {
					b.Fatal(err)
				}
			}
			for b.Loop() {
				if _, err := m.Put(b.Context(), "b", "k", nil, auth.AnyVersion, expires); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
