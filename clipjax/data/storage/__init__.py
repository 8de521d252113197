"""Where the bytes of a dataset lie: found and read on this machine, gs://, s3://, https:// and hf://."""
