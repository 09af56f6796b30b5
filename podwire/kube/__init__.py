"""The Kubernetes API as podwire sees it: typed objects, a list/watch client, one store.

In: the API's JSON. Out: `Store` with change sets. No meaning is given to objects here.
"""
