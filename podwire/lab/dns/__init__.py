"""The cluster's DNS: names of Services, endpoints and pods, over UDP and TCP.

In: change sets of Services, EndpointSlices and Namespaces; queries. Out: answers as the Kubernetes
DNS specification 1.1.0 has them.
"""

from podwire.lab.dns.server import DnsServer, follow
from podwire.lab.dns.zone import Zone

__all__ = ["DnsServer", "Zone", "follow"]
