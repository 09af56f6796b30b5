"""The local address manager of VPC mode: ENIs, prefixes, warm targets, EC2 and IMDS.

In: demand for addresses (ADD, DEL), EC2's and IMDS's answers. Out: addresses of the VPC for pods,
and EC2 calls that keep a few of them warm. `pool` and `plan` are arithmetic, `datastore` the books,
`manager` the loop between both; `cloud` says what a cloud must answer, `ec2` and `imds` ask it.
"""
