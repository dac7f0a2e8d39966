// The strings of a GGUF file's header, of which a vocabulary has a hundred thousand.
#include "gguf.h"

#include <cstring>

namespace py = pybind11;

namespace llmcore {
namespace {

// Up to `count` strings from byte `at` on, each a 64-bit length and so many bytes of UTF-8. Gives those before the
// first that is no whole string, and where they end: the reader in Python goes on from there, and says what is wrong.
py::tuple read_strings(const py::buffer& bytes, size_t at, size_t count) {
  const py::buffer_info info = bytes.request();
  const char* data = static_cast<const char*>(info.ptr);
  const size_t size = static_cast<size_t>(info.size * info.itemsize);
  py::list found;
  for (; count > 0 && at <= size && size - at >= sizeof(uint64_t); --count) {
    uint64_t length;
    std::memcpy(&length, data + at, sizeof(length));
    if (length > size - at - sizeof(length)) break;
    PyObject* text = PyUnicode_DecodeUTF8(data + at + sizeof(length), static_cast<Py_ssize_t>(length), nullptr);
    if (text == nullptr) {
      if (!PyErr_ExceptionMatches(PyExc_UnicodeDecodeError)) throw py::error_already_set();
      PyErr_Clear();
      break;
    }
    found.append(py::reinterpret_steal<py::object>(text));
    at += sizeof(length) + length;
  }
  return py::make_tuple(found, at);
}

}  // namespace

void add_gguf(py::module_& m) {
  m.def("read_strings", &read_strings, py::arg("bytes"), py::arg("at"), py::arg("count"));
}

}  // namespace llmcore
