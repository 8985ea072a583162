"""Figures of training runs, traces and evaluations: their readers, pictures in files, plots on a terminal."""
