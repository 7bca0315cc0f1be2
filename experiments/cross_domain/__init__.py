"""X-Cross on real recommendation data: adapters of three domains, a fourth to learn. See `__main__`."""
