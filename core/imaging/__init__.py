"""From a file's bytes to grey values: DICOM, PNG and JPEG into one `Radiograph`."""
