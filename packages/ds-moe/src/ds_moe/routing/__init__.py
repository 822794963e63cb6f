"""The choice of experts for tokens: pure functions, and the module that holds the router's weights."""
