//go:build race

package auth

func init() { raceDetector = true }
