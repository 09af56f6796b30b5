"""Services, policies, pods and masquerade on eBPF: tables in, map updates out. See docs/EBPF.md.

`programs.Programs` loads, pins and attaches for all parts of a node; `services.ServicesPart`,
`policy.PolicyPart` and `nodes.NodesPart` each keep their maps; `pods.EbpfPods` knows the links.
"""
