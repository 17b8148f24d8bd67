"""Linear attention: chunk states, their scan, and results of rows; few tokens one after another; and the gradients."""
