"""The cloud of the lab: EC2's API and the instance metadata service, and the VPC as a network.

In: EC2 Query requests and IMDSv2 requests over HTTP, so that boto3 and the agent's own IMDS client
are real clients. Out: EC2's answers and errors, and links, addresses and routes in namespaces.
"""
