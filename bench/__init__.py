"""The benchmark: a customer of the endpoint, over HTTP and processes only. It imports `cluster` and nothing else of ours."""
