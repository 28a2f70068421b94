"""Parts that the recipes share. A recipe imports from here, and never from another recipe."""
