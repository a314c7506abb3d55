"""What many steps tell, at the last layer: which groups pass, and which rows are believed."""
