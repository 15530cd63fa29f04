// A CUDA device for a PyTorch without CUDA: its memory is the host's, its kernels are the CPU's. Each operator is called
// on CPU tensors that share the memory of its arguments, and what it returns is on the device again. Tensors of
// different devices are refused as on a GPU; operations for which the host would wait are counted or reported.

#include <ATen/ATen.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <torch/library.h>

#include <optional>
#include <set>
#include <unordered_map>

using Guard = c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>;
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

namespace {

bool warns = false;  // as torch.cuda.set_sync_debug_mode("warn")

c10::Device current() { return {c10::kCUDA, Guard::getDeviceIndex()}; }

// The memory of `owner`, which lives as long as it is used.
c10::DataPtr borrowed(const c10::Storage& owner, c10::Device device) {
  void* memory = owner.unsafeGetStorageImpl()->mutable_data();
  return {memory, new c10::Storage(owner), [](void* kept) { delete static_cast<c10::Storage*>(kept); }, device};
}

c10::Storage host_storage(size_t bytes) {
  return {c10::Storage::use_byte_size_t(), bytes, c10::GetAllocator(c10::kCPU), true};
}

struct Memory final : c10::Allocator {
  Memory() { c10::SetAllocator(c10::kCUDA, this); }
  c10::DataPtr allocate(size_t bytes) override { return borrowed(host_storage(bytes), current()); }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
} memory;

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return c10::impl::kFakeGuardImplMaxDevices; }
  c10::DeviceIndex deviceCount() const override { return c10::impl::kFakeGuardImplMaxDevices; }
  c10::DeviceIndex current_device() const override { return current().index(); }
  c10::DeviceIndex getCurrentDevice() const override { return current().index(); }
  void setCurrentDevice(c10::DeviceIndex index) const override { Guard::setDeviceIndex(index); }
  c10::Device getDeviceFromPtr(void*) const override { return current(); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
  c10::Allocator* getCUDADeviceAllocator() const override { return &memory; }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};

// One call of an operator: its tensors on the device, and their aliases on the host.
struct Call {
  std::unordered_map<c10::StorageImpl*, c10::Storage> aliases;                            // device → host
  std::unordered_map<c10::StorageImpl*, std::pair<c10::Storage, c10::Storage>> storages;  // host → (device, host)
  std::unordered_map<c10::TensorImpl*, std::pair<at::Tensor, at::Tensor>> tensors;        // host → (device, host)
  std::unordered_map<c10::TensorImpl*, at::Tensor> given_on_host;
  std::optional<c10::Device> device;
  bool shaped_on_host = false;  // has got a tensor of the CPU that is no scalar

  at::Tensor to_host(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      given_on_host.emplace(tensor.unsafeGetTensorImpl(), tensor);
      shaped_on_host |= tensor.dim() > 0;
      return tensor;
    }
    TORCH_CHECK(!device || *device == tensor.device(), "Expected all tensors to be on the same device, but found ",
                *device, " and ", tensor.device());
    device = tensor.device();
    c10::Storage storage = tensor.storage();
    auto found = aliases.find(storage.unsafeGetStorageImpl());
    if (found == aliases.end()) {
      c10::Storage host(c10::Storage::use_byte_size_t(), storage.nbytes(), borrowed(storage, c10::kCPU),
                        c10::GetAllocator(c10::kCPU), true);
      storages.emplace(host.unsafeGetStorageImpl(), std::make_pair(storage, host));
      found = aliases.emplace(storage.unsafeGetStorageImpl(), host).first;
    }
    at::Tensor host = made(found->second, c10::DispatchKey::CPU, tensor);
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) host.unsafeGetTensorImpl()->set_wrapped_number(true);
    tensors.emplace(host.unsafeGetTensorImpl(), std::make_pair(tensor, host));
    return host;
  }

  at::Tensor to_device(const at::Tensor& tensor) {
    if (!tensor.defined() || tensor.is_cuda() || given_on_host.count(tensor.unsafeGetTensorImpl())) return tensor;
    if (auto found = tensors.find(tensor.unsafeGetTensorImpl()); found != tensors.end()) return found->second.first;
    c10::Storage storage = tensor.storage();
    auto viewed = storages.find(storage.unsafeGetStorageImpl());
    if (viewed != storages.end()) return made(viewed->second.first, c10::DispatchKey::CUDA, tensor);
    c10::Storage fresh(c10::Storage::use_byte_size_t(), storage.nbytes(), borrowed(storage, device.value_or(current())),
                       &memory, true);
    return made(fresh, c10::DispatchKey::CUDA, tensor);
  }

  // What an operator has resized on the host is resized on the device.
  void take_over_sizes() {
    for (auto& [host, pair] : storages) {
      auto* storage = pair.first.unsafeGetStorageImpl();
      if (host->data() == storage->data() && host->nbytes() == storage->nbytes()) continue;
      storage->set_data_ptr_noswap(borrowed(pair.second, storage->device()));
      storage->set_nbytes(host->nbytes());
    }
    for (auto& [impl, pair] : tensors) {
      auto& [tensor, host] = pair;
      if (tensor.sizes() != host.sizes() || tensor.strides() != host.strides())
        tensor.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    }
  }

  static at::Tensor made(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
    auto tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
    tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
    return tensor;
  }
};

template <class F>
c10::IValue mapped(const c10::IValue& value, F f) {
  if (value.isTensor()) return f(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorList()) list.push_back(f(tensor));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList())
      list.push_back(tensor ? std::make_optional(f(*tensor)) : std::nullopt);
    return list;
  }
  if (value.isList() && !value.toListRef().empty() && value.toListRef()[0].isTensorList()) {
    c10::List<c10::List<at::Tensor>> lists;
    for (const c10::IValue& inner : value.toListRef()) lists.push_back(mapped(inner, f).toTensorList());
    return lists;
  }
  return value;
}

// The CPU's kernel, for every operator that has none of the device.
void on_host(const c10::OperatorHandle& op, c10::Stack* stack) {
  static const std::set<std::string> mixing = {"aten::copy_", "aten::index", "aten::index_put_",
                                               "aten::_index_put_impl_", "aten::set_"};
  static const std::set<std::string> waiting = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal",
                                                "aten::masked_select", "aten::_unique2", "aten::bincount"};
  const auto& schema = op.schema();
  const std::string& name = schema.operator_name().name;
  Call call;
  const size_t first = stack->size() - schema.arguments().size();
  const bool from_device = name == "aten::copy_" && !(*stack)[first].toTensor().is_cuda();
  const bool waits = waiting.count(name) || (from_device && !(*stack)[first + 2].toBool());
  if (waits && warns) TORCH_WARN("called a synchronizing CUDA operation: ", name);
  for (size_t i = first; i < stack->size(); i++) {
    c10::IValue& value = (*stack)[i];
    if (value.isDevice() && value.toDevice().is_cuda()) {
      if (value.toDevice().has_index()) call.device = value.toDevice();
      value = c10::Device(c10::kCPU);
    } else {
      value = mapped(value, [&](const at::Tensor& tensor) { return call.to_host(tensor); });
    }
  }
  TORCH_CHECK(call.tensors.empty() || !call.shaped_on_host || mixing.count(name),
              "Expected all tensors to be on the same device, but found at least two devices, cuda and cpu! (", name, ")");
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.take_over_sizes();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++)
    (*stack)[i] = mapped((*stack)[i], [&](const at::Tensor& tensor) { return call.to_device(tensor); });
}

// A collective that is over.
struct Done final : c10d::Work {
  explicit Done(c10::intrusive_ptr<c10::ivalue::Future> future) : future(std::move(future)) {}
  bool isCompleted() override { return true; }
  bool isSuccess() const override { return true; }
  bool wait(std::chrono::milliseconds) override { return true; }
  void synchronize() override {}
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override { return future; }
  std::vector<at::Tensor> result() override { return future->value().toTensorVector(); }
  c10::intrusive_ptr<c10::ivalue::Future> future;
};

// gloo's, in place of NCCL's.
void collective(const c10::OperatorHandle& op, c10::Stack* stack) {
  on_host(op, stack);
  stack->back().toCustomClass<c10d::Work>()->wait();
  std::vector<at::Tensor> tensors;
  if (op.schema().returns().size() > 1)
    mapped((*stack)[stack->size() - op.schema().returns().size()], [&](const at::Tensor& tensor) {
      tensors.push_back(tensor);
      return tensor;
    });
  auto future = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
  future->markCompleted(c10::IValue(tensors));
  stack->back() = c10::IValue(c10::intrusive_ptr<c10d::Work>(c10::make_intrusive<Done>(future)));
}

}  // namespace

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, ::Hooks)
}

namespace c10d {
struct HostTimer final : Timer {
  explicit HostTimer(c10::Device) {}
  std::optional<int64_t> measureDifference(Event begin, Event end) override { return getTimeRef(end) - getTimeRef(begin); }
};
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kCUDA, HostTimer)
}  // namespace c10d

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>()); }
// These have a kernel for CUDA that looks for what is not there.
TORCH_LIBRARY_IMPL(aten, CUDA, m) { m.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&on_host>()); }
TORCH_LIBRARY_IMPL(c10d, CUDA, m) {
  for (const char* name : {"allgather_", "_allgather_base_", "allgather_into_tensor_coalesced_", "allreduce_",
                           "allreduce_coalesced_", "alltoall_", "alltoall_base_", "barrier", "broadcast_", "gather_",
                           "reduce_", "reduce_scatter_", "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_",
                           "scatter_"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&collective>());
}

extern "C" {
int current_device() { return current().index(); }
void set_device(int index) { Guard::setDeviceIndex(index); }
void set_warns(bool on) { warns = on; }
void resize_storage(c10::StorageImpl* storage, size_t bytes) {
  c10::DataPtr fresh = memory.allocate(bytes);
  memcpy(fresh.get(), storage->data(), std::min(bytes, storage->nbytes()));
  storage->set_data_ptr_noswap(std::move(fresh));
  storage->set_nbytes(bytes);
}
}
