package auth_test

import (
	"testing"

	"gatehouse/auth"
	"gatehouse/auth/storetest"
)

func TestRedis(t *testing.T) {
	storetest.Run(t, func(t *testing.T, c storetest.Config) (a, b auth.Store) {
		return auth.RedisForTests(t, c.MaxRecords, c.Now)
	})
}
