"""The (m, m) covariance of losses, accumulated draw by draw."""
