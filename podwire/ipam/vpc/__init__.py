"""The local address manager of VPC mode: ENIs, prefixes, warm targets, EC2 and IMDS."""
