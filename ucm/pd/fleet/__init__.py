"""The instances behind the proxy: who is there, who is well, who is next."""
