"""The web page: a chat about images over the server's scheduler, made with Gradio."""
