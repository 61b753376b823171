// The Python module wsam_fused._C: reads the gradients of a parameter list in one pass.
//
// The objects of thousands of tensors do not fit a cache, so a step over small tensors waits for
// memory; this visits each object once, where the same checks in Python take a pass each. Only the
// limited API is used (one build for all Pythons), and only what torch.Tensor shows to Python.
// Without Python's headers the file is empty and wsam_fused/gradients.py does all of it in Python.
#if __has_include(<Python.h>)
#include <Python.h>

#include <cstdint>

namespace {

struct Request {
  PyObject *params, *dtype;
  PyObject *grad_name, *dtype_name;                                   // attribute names
  PyObject *data_ptr, *is_contiguous, *is_view, *numel, *get_device;  // methods of torch.Tensor
  int64_t device;        // what get_device says of the parameters
  const int64_t* known;  // addresses of the parameters
  const int64_t* sizes;  // elements of the parameters
  int64_t* addresses;    // out: addresses of the gradients
  bool take;             // leave None in .grad
};

// Calls a method without arguments and compares its result with a singleton.
bool returns(PyObject* method, PyObject* tensor, PyObject* expected) {
  PyObject* const result = PyObject_CallFunctionObjArgs(method, tensor, nullptr);
  Py_XDECREF(result);
  return result == expected;
}

// Calls a method without arguments that returns an integer.
bool integer_of(PyObject* method, PyObject* tensor, int64_t* value) {
  PyObject* const result = PyObject_CallFunctionObjArgs(method, tensor, nullptr);
  if (!result) return false;
  *value = PyLong_AsLongLong(result);
  Py_DECREF(result);
  return !(*value == -1 && PyErr_Occurred());
}

bool has_dtype(const Request& request, PyObject* tensor) {
  PyObject* const dtype = PyObject_GetAttr(tensor, request.dtype_name);
  Py_XDECREF(dtype);
  return dtype == request.dtype;
}

// Whether a gradient is as usual; notes its address and takes it out of `.grad`.
bool is_usual(const Request& request, Py_ssize_t index, PyObject* param, PyObject* grad) {
  int64_t size = 0, device = 0;
  return has_dtype(request, grad) && returns(request.is_contiguous, grad, Py_True) &&
         (!request.take || returns(request.is_view, grad, Py_False)) &&
         integer_of(request.numel, grad, &size) && size == request.sizes[index] &&
         integer_of(request.get_device, grad, &device) && device == request.device &&
         integer_of(request.data_ptr, grad, &request.addresses[index]) &&
         (!request.take || PyObject_SetAttr(param, request.grad_name, Py_None) == 0);
}

// Reads one gradient (a new reference), which may be None; null if anything about it or its
// parameter is not as usual.
PyObject* usual_gradient(const Request& request, Py_ssize_t index) {
  PyObject* const param = PyList_GetItem(request.params, index);
  PyObject* const grad = param ? PyObject_GetAttr(param, request.grad_name) : nullptr;
  if (!grad) return nullptr;
  int64_t param_address = 0;
  const bool is_in_place = returns(request.is_contiguous, param, Py_True) &&
                           integer_of(request.data_ptr, param, &param_address) &&
                           param_address == request.known[index];
  if (grad == Py_None) request.addresses[index] = 0;
  if (is_in_place && (grad == Py_None || is_usual(request, index, param, grad))) return grad;
  Py_DECREF(grad);
  return nullptr;
}

// Puts what was taken back; the list holds `count` gradients.
void give_back(const Request& request, PyObject* grads, Py_ssize_t count) {
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject_SetAttr(PyList_GetItem(request.params, i), request.grad_name,
                     PyList_GetItem(grads, i));
  }
}

PyObject* read_gradients(PyObject*, PyObject* args) {
  Request request{};
  unsigned long long known = 0, sizes = 0, addresses = 0;
  long long device = 0;
  int take = 0;
  if (!PyArg_ParseTuple(args, "OO(OO)(OOOOO)LKKKp", &request.params, &request.dtype,
                        &request.grad_name, &request.dtype_name, &request.data_ptr,
                        &request.is_contiguous, &request.is_view, &request.numel,
                        &request.get_device, &device, &known, &sizes, &addresses, &take)) {
    return nullptr;
  }
  request.device = device;
  request.known = reinterpret_cast<const int64_t*>(known);
  request.sizes = reinterpret_cast<const int64_t*>(sizes);
  request.addresses = reinterpret_cast<int64_t*>(addresses);
  request.take = take != 0;
  const Py_ssize_t count = PyList_Size(request.params);
  PyObject* const grads = count < 0 ? nullptr : PyList_New(count);
  if (!grads) return nullptr;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const grad = usual_gradient(request, i);
    if (grad) {
      PyList_SetItem(grads, i, grad);
      continue;
    }
    PyErr_Clear();  // the caller meets the same condition again and reports it
    if (request.take) give_back(request, grads, i);
    Py_DECREF(grads);
    Py_RETURN_NONE;
  }
  return grads;
}

PyMethodDef methods[] = {
    {"read_gradients", read_gradients, METH_VARARGS,
     "read_gradients(params, dtype, names, methods, device, known, sizes, addresses, take) -> "
     "list | None"},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
  return PyModule_Create(&module);
}
#endif
