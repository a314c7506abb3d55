"""What a fit has learned of its data: rows, groups and classes, in files and figures."""
