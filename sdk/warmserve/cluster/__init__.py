"""Cluster state: the key layout in etcd, a store over it, and the event stream in Redis.

Shared by `warmctl` and the services. Needs the `cluster` extra (aetcd, redis).
"""
