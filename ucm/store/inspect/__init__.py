"""Looking into a store from outside: what lies in it, whether it is whole, what a mount can do."""
