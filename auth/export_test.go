package auth

// AtPoint calls f at each named point of the file store's writes.
func AtPoint(f func(point string)) { reached = f }
