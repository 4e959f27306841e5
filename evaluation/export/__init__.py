"""A backbone as a file for other programs: ONNX, ExportedProgram, int8; checked."""
