"""Trains a small byte-level Sigma on real text and generates from it: `make demo`."""
