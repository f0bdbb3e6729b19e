"""A request's two legs, and what a client gets of them."""
