"""Public data sets and simulators, one module each: download or simulate, verify, convert to canonical Parquet."""
