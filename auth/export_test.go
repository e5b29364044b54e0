package auth

// AtPoint calls f at each named point of the file store's writes.
func AtPoint(f func(point string)) { reached = f }

// GrantName is what a store's watch calls the grant under a key.
func GrantName(key string) string { return hash(bucketGrants, key) }

// BucketGrants is the bucket of grants.
const BucketGrants = bucketGrants
