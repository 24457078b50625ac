"""The data of MiniGPT-4's second stage, made from images: described, polished, checked, exported."""
