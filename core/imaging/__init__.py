"""Image reading: DICOM, PNG and JPEG files, decoded into one `Radiograph`."""
