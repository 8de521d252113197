"""The kinds of stored datasets, each as a source: tars, parquet, tables, folders and TFDS."""
