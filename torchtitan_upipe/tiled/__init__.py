"""Everything in a model that works row by row, in tiles of rows: norm, feed-forward, loss."""
