"""The lab's kubelet and container runtime, for all nodes in one process.

In: pods bound to the lab's nodes. Out: namespaces wired by the CNI plugin, echo servers in them,
pod and node status. Containers' images, commands and environments are not executed: the lab shows
the network, so every container is the echo server (`podwire.lab.echo`), which listens on the
declared container ports and on the numeric target ports of Services that select the pod.
Init containers have succeeded at once; pods of a Job succeed after a second; exec probes succeed.
"""
