"""Commands on finished edits: find their files, ask questions, count how many hold."""
