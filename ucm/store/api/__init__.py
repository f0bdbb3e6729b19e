"""What is behind the store API's door: tasks, and the thread that does them."""
