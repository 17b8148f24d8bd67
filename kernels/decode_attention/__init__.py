"""Decode attention: a few new queries per sequence against a KV cache, split over the keys."""
