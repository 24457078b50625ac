"""Benchmarks: reading their files, answering, scoring, reports."""
