"""The native CPU library: C++ sources, and how they are built, found and loaded."""
