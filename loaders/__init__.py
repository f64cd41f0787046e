"""Integrations with serving stacks, installed as `weightcache.loaders`.

A loader imports the public face of weightcache alone, and nothing of its stack before it is asked for.
"""
