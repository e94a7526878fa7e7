"""Common parts of the tests and of the chaos harness, which read like the field they test.

=================  ==============================================================================
`clock`            a clock that a test sets
`waits`            waiting for an event, with what to show if it does not come
`pictures`         small PNG and DICOM files and archives by number, each of other bytes
`radiographs`      DICOM data sets with the attributes that a test asks for
`shortcuts`        drawn radiographs with a planted shortcut, and linear models trained on them
`bundles`          small model bundles with a content gate or further findings (needs `onnx`)
`commands`         the tree of `lungwatch`'s commands
`processes`        the installed command and the daemon in processes of their own
`homes`            a home folder, its daemon and its record, as an administrator sees them
`record`           the rows of a home's database, read without lungwatch's own code
`rows`             claims and results for a database, with values for what a test does not vary
`results`          a finished result, as the objects for a PACS are made of it
`leaks`            the guard against threads and descriptors that a test leaves behind
`markers`          which markers a test has
`postgres`         a PostgreSQL server that is started for the tests
`peers`            DICOM peers: DCMTK's tools and Orthanc
=================  ==============================================================================
"""
