#include "ds/grouped.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/elementwise.h"
#include "cpu/grouped.h"
#include "dispatch/kernel_table.h"
#include "ds/parallel.h"

namespace ds {
namespace {

// Rows of one expert that a thread takes at once, where there are several threads; a multiple of a tile's
// rows.
constexpr std::int64_t kRowsAtOnce = 240;

struct Task {
  std::int64_t group;
  std::int64_t row;  // the first, of all experts' rows
  std::int64_t rows;
};

std::vector<Task> tasks_of(const GroupedLinear& job, std::int64_t rows_at_once) {
  std::vector<Task> tasks;
  tasks.reserve(static_cast<std::size_t>(job.groups));
  std::int64_t begin = 0;
  for (std::int64_t g = 0; g < job.groups; ++g) {
    const std::int64_t end = begin + job.sizes[g];
    for (; begin < end; begin += rows_at_once)
      tasks.push_back({g, begin, std::min(rows_at_once, end - begin)});
    begin = end;
  }
  return tasks;
}

std::int64_t panels_of(std::int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// Runs panel(task, first column, number of columns, scratch) for all.
template <class Panel>
void for_each_panel(const std::vector<Task>& tasks, std::int64_t columns, std::int64_t depth, int num_threads,
                    Panel panel) {
  const std::int64_t panels = panels_of(columns);
  parallel_for(static_cast<std::int64_t>(tasks.size()) * panels, num_threads, [&](std::int64_t index) {
    const Task& task = tasks[static_cast<std::size_t>(index / panels)];
    const std::int64_t first = index % panels * kPanel;
    const auto scratch = std::make_unique_for_overwrite<float[]>(
        static_cast<std::size_t>(grouped_scratch(depth < 0 ? task.rows : depth)));
    panel(task, first, std::min(kPanel, columns - first), scratch.get());
  });
}

std::int64_t rows_at_once(int num_threads) { return num_threads == 1 ? std::int64_t{1} << 62 : kRowsAtOnce; }

}  // namespace

void grouped_linear(const GroupedLinear& job, const void* x, const void* weight, const void* bias, void* out,
                    int num_threads) {
  const auto kernel = kernels().grouped_linear[state_kind(job.dtype)];
  for_each_panel(tasks_of(job, rows_at_once(num_threads)), job.outputs, job.inputs, num_threads,
                 [&](const Task& task, std::int64_t first, std::int64_t columns, float* scratch) {
                   const std::int64_t output = task.group * job.outputs + first;
                   kernel({.a = at(x, job.dtype, task.row * job.inputs),
                           .a_row = job.inputs,
                           .b = at(weight, job.dtype, output * job.inputs),
                           .b_row = job.inputs,
                           .bias = at(bias, job.dtype, output),
                           .c = at(out, job.dtype, task.row * job.outputs + first),
                           .c_row = job.outputs,
                           .rows = task.rows,
                           .columns = columns,
                           .depth = job.inputs,
                           .column_sums = nullptr},
                          scratch);
                 });
}

void grouped_linear_grad_input(const GroupedLinear& job, const void* grad, const void* weight, void* dx,
                               int num_threads) {
  const auto kernel = kernels().grouped_grad_input[state_kind(job.dtype)];
  for_each_panel(tasks_of(job, rows_at_once(num_threads)), job.inputs, job.outputs, num_threads,
                 [&](const Task& task, std::int64_t first, std::int64_t columns, float* scratch) {
                   kernel({.a = at(grad, job.dtype, task.row * job.outputs),
                           .a_row = job.outputs,
                           .b = at(weight, job.dtype, task.group * job.outputs * job.inputs + first),
                           .b_row = job.inputs,
                           .bias = nullptr,
                           .c = at(dx, job.dtype, task.row * job.inputs + first),
                           .c_row = job.inputs,
                           .rows = task.rows,
                           .columns = columns,
                           .depth = job.outputs,
                           .column_sums = nullptr},
                          scratch);
                 });
}

void grouped_linear_grad_weight(const GroupedLinear& job, const void* grad, const void* x, void* dw,
                                void* dbias, int num_threads) {
  const auto kernel = kernels().grouped_grad_weight[state_kind(job.dtype)];
  std::vector<Task> tasks;  // one for each expert, also without rows
  std::int64_t begin = 0;
  for (std::int64_t g = 0; g < job.groups; ++g) {
    tasks.push_back({g, begin, job.sizes[g]});
    begin += job.sizes[g];
  }
  for_each_panel(tasks, job.inputs, -1, num_threads,
                 [&](const Task& task, std::int64_t first, std::int64_t columns, float* scratch) {
                   const std::int64_t output = task.group * job.outputs;
                   kernel({.a = at(grad, job.dtype, task.row * job.outputs),
                           .a_row = job.outputs,
                           .b = at(x, job.dtype, task.row * job.inputs + first),
                           .b_row = job.inputs,
                           .bias = nullptr,
                           .c = at(dw, job.dtype, output * job.inputs + first),
                           .c_row = job.inputs,
                           .rows = job.outputs,
                           .columns = columns,
                           .depth = task.rows,
                           .column_sums = first == 0 ? at(dbias, job.dtype, output) : nullptr},
                          scratch);
                 });
}

}  // namespace ds
