"""Judge the labels of a folder, a manifest or a table by trusted rows, without training."""
