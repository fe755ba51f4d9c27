"""Details of a failed call beyond its code: servers write them, clients read them.

A status travels in two trailers: the code with its text, and `grpc-status-details-bin`, a google.rpc.Status with

    ErrorInfo      always, exactly one: reason, domain "weft", metadata
    BadRequest     for INVALID_ARGUMENT that names a field
    RetryInfo      if and only if the error has a retry delay
    QuotaFailure   for RESOURCE_EXHAUSTED that names a quota or its owner
    ResourceInfo   for NOT_FOUND that names an adapter
"""

DOMAIN = "weft"
DETAILS_KEY = "grpc-status-details-bin"
